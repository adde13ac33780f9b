"""Role and block from the graph alone, for models whose names tell nothing. (first version: names only)"""
def infer(products):
    return products
