"""What `kvtier doctor` looks at: the machine, and each tier of a configuration."""
