"""Version 1 of the wire contract; the code here is generated from teacher.proto."""
