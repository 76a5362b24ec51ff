//! How virtd locks what it holds for a few lines.

pub(crate) use virt_model::lock::lock;
