//! Images that clients have open themselves and give by descriptor: how a call may bring one. What they are is judged by the driver;
//! what runs tells of them (`fdgroup`), nothing that is stored does.

use super::Affect;
use crate::error::{Error, Result};
use std::sync::Arc;
use virt_model::driver::GivenFile;
use virt_model::xml::{Element, shorten};

/// The one image that a call has brought, if any, and which configuration it is for: what runs.
pub(super) fn one(affect: Affect, mut images: Vec<GivenFile>) -> Result<(Affect, Option<Arc<GivenFile>>)> {
    let Some(image) = images.pop() else { return Ok((affect, None)) };
    if !images.is_empty() {
        let count = images.len() + 1;
        return Err(Error::InvalidArgument(format!("a disk has one image, and {count} descriptors were given")));
    }
    if affect.config {
        let text = "an image can be given by descriptor to what runs alone: leave out 'config'";
        return Err(Error::InvalidArgument(text.to_owned()));
    }
    Ok((Affect { live: true, config: false }, Some(Arc::new(image))))
}

/// Refuses a document that says by which descriptor an image is read: that is told, and never asked for.
pub(super) fn names_none(name: &str, device: &Element) -> Result<()> {
    match says_fdgroup(device) {
        false => Ok(()),
        true => Err(Error::InvalidArgument(format!(
            "domain '{name}': 'fdgroup' tells that an image was given by descriptor; leave it out, and give a descriptor with \
             the call, or the image is opened by its path"
        ))),
    }
}

fn says_fdgroup(element: &Element) -> bool {
    element.attr("fdgroup").is_some() || element.elements().any(says_fdgroup)
}

/// What is given is no image of that device's.
pub(super) fn of_no_disk(name: &str, device: &Element) -> Error {
    let what = shorten(&device.name);
    Error::InvalidArgument(format!("domain '{name}': a <{what}> has no image that a descriptor could be of"))
}
