class Helper(:
    pass
