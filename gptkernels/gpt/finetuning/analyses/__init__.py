"""The analyses of GPT-1's paper (Radford et al. 2018, section 5), each with its figures.

layers.py      what each block that is transferred adds         figure 2, left
snapshots.py   what pre-training teaches without fine-tuning    figure 2, right
ablations.py   what the auxiliary loss and pre-training add     table 5
"""
