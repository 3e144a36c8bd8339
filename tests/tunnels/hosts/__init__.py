"""Hosts as people have them: accounts with their own login shells, on OpenSSH's sshd and on dropbear."""
