"""A demonstration on generated data whose truth is known: does the selection find the examples worth learning?"""
