"""The comparison of trained models: does the selection train a better model than other sets of rows?"""
