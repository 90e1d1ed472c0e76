import json

limit = json.loads("[1, 2")
