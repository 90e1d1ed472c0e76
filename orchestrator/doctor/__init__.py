"""What is wrong on this host: facts are gathered once, and each probe judges them; no probe touches the system."""
