//! Answers that several objects give.

use super::paths;
use super::snapshot::verdict;
use crate::error::Error;
use std::collections::HashMap;
use virt_model::xml::{Finding, FindingKind};
use virt_service::StorageCheck;
use virt_service::object::ObjectRef;
use zbus::{ObjectPath, Variant};

/// A finding as severity, line, column and message.
pub fn finding(finding: &Finding) -> (&'static str, u32, u32, String) {
    let severity = match finding.kind {
        FindingKind::Warning => "warning",
        FindingKind::Invalid | FindingKind::Unsupported => "error",
    };
    (severity, finding.line, finding.column, format!("{}: {}", finding.path, finding.message))
}

/// What a verb would do, of which nothing is done.
pub fn storage_check(check: StorageCheck) -> Result<HashMap<&'static str, Variant<'static>>, Error> {
    let path = |object: &ObjectRef| paths::argument(paths::of(object));
    let users: Vec<(ObjectPath<'static>, String, &'static str)> = check
        .users
        .iter()
        .map(|user| Ok((path(&user.object)?, user.place.clone(), user.how.as_str())))
        .collect::<Result<_, Error>>()?;
    let breaks: Vec<ObjectPath<'static>> = check.breaks.iter().map(path).collect::<Result<_, Error>>()?;
    let rest = [
        ("users", Variant::from(users)),
        ("breaks", Variant::from(breaks)),
        ("files", Variant::from(check.files)),
        ("frees", Variant::from(check.frees)),
        ("needs", Variant::from(check.needs)),
    ];
    Ok(verdict(check.refusal.as_ref()).into_iter().chain(rest).collect())
}
