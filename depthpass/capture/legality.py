"""Which ops are token-local. Placeholder replaced below."""
def check_token_local(nodes, tokens, where, skip=()):
    return None
