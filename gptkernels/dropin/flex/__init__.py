"""FlexAttention's function by this package's ops: expression.py reads what a mask_mod or score_mod
computes, masks.py and scores.py know forms of it, blocks.py holds a BlockMask to them, and op.py
calls the ops."""
