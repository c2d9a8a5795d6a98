"""An emulated Globus on loopback: what the daemon, the SDK and the CLI talk to in tests. See README.md."""
