"""What every op uses: registration, the choice of an implementation, checks of arguments, dropout's
masks, the compiled module and Triton."""
