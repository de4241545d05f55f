"""The fused ops: one module each, from the public function down to the choice of implementation."""
