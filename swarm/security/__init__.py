"""Who is who: the cluster's CA, join tokens, certificates with a role, and who may call what."""
