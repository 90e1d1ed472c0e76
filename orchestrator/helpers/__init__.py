"""Our own helpers, one file per protocol, written against orchestrator.engine.api like anybody's."""
