//! The faces of virtd: D-Bus objects, signals, polkit.
