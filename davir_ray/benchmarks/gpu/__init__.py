"""One command on a machine with a GPU: is scoring and training exact there, and how fast is it?"""
