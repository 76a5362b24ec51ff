//! `org.virt.Secret`: what is published of secrets. Never anything of their values.

use super::{Lifecycle, Published, paths, properties};
use crate::bus::rows::{Facts, Object};
use std::sync::Arc;
use virt_service::facts::{ObjectFacts, SecretFacts};
use virt_service::object::{ObjectRef, User};

/// The interface.
pub const INTERFACE: &str = "org.virt.Secret";

/// The interface of the manager that has to do with secrets.
pub const MANAGER: &str = "org.virt.Manager.Secret";

properties! {
    f: SecretFacts {
        "UUID" = Str(&f.uuid.to_string());
        "UsageType" = Str(f.usage_type);
        "UsageID" = Str(&f.usage_id);
        "Description" = Str(&f.description);
        "Ephemeral" = Bool(f.ephemeral);
        "Private" = Bool(f.private);
        "HasValue" = Bool(f.has_value);
        "ValueChanged" = U64(f.value_changed_usec);
        "Protection" = Str(f.protection);
        "Owner" = U32(f.owner);
        "Users" = Users(&users(&f.users));
        "Broken" = Str(&f.broken);
    }
}

/// See [`super::published`].
pub fn published(facts: &Arc<SecretFacts>) -> Published {
    let object = Object::new(paths::of(&ObjectRef::Secret(facts.uuid)), INTERFACE, row(facts));
    Published {
        object: object.of(Facts::Other(ObjectFacts::Secret(facts.clone()))),
        lifecycle: Some(Lifecycle {
            manager: MANAGER,
            member: "SecretLifecycle",
            names: vec![facts.uuid.to_string()],
            detailed: false,
        }),
    }
}

/// Users as they are shown on the bus, wherever objects have some.
pub fn users(users: &[User]) -> Vec<(String, &str, &'static str)> {
    users.iter().map(|user| (paths::of(&user.object), &*user.place, user.how.as_str())).collect()
}
