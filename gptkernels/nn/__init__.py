"""Drop-in layers: each has the state_dict of the module that it replaces."""
