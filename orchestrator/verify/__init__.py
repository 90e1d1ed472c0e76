"""Is what a profile promises true? Canned dialogues through throw-away namespaces, with the real engines."""
