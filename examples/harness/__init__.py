"""What every experiment shares: settings, arms and their twins, training, resume, tables, pictures."""
