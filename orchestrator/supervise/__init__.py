"""Helper processes: started detached, found by looking, watched so that a death disables their registrations."""
