"""The teacher server: scores text it did not write, over HTTP and gRPC."""
