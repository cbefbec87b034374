"""The private folder of this user's control sockets."""
