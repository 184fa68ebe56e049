"""Storage of studies: database access, locks, heartbeats and files shared by workers."""
