//! virtd, the daemon.

fn main() {}
