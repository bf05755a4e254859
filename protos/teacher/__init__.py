"""The protobuf package `teacher`."""
