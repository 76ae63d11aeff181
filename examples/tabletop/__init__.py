"""A procedural tabletop: real video files, exact ground truth, six objectives, nine dimensions."""
