"""The primary tier: host memory, the only tier that the device copies to and from."""
