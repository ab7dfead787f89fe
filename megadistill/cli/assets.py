def ensure_assets(config):
    pass
