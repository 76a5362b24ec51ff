//! How hypervisors are moved. One folder each.
