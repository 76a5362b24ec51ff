//! The example rules under a real polkitd: who is let through, and who would be asked for a password.

use crate::common::users::{ADMIN, ALICE, BOB, OPERATOR, User};
use crate::common::{Daemon, Setup};
use std::collections::HashMap;
use virt_service::authz::Action;
use virt_service::object::ObjectKind;

/// What anybody may do: to read what is no secret.
fn is_free(action: Action) -> bool {
    use Action::{DeviceRead, NetworkRead, Read, SecretRead, StorageRead};
    matches!(action, Read | NetworkRead | StorageRead | SecretRead | DeviceRead)
}

/// What polkit says to `user` doing `action` to a machine of alice's, or to one that is only about to be defined.
async fn answer(daemon: &Daemon, user: &User, action: Action, owned: bool) -> &'static str {
    let connection = daemon.connect_as(user).await;
    let name = connection.unique_name().unwrap().to_string();
    let mut details = HashMap::from([("driver", "test"), ("domain_name", "web")]);
    if owned {
        details.extend([("owner", ALICE.name), ("owner_uid", "60001")]);
    }
    let subject = ("system-bus-name", HashMap::from([("name", zbus::Variant::from(name))]));
    let ours = daemon.connect().await;
    let (polkit, interface) = ("org.freedesktop.PolicyKit1", "org.freedesktop.PolicyKit1.Authority");
    let question = (subject, action.id(), details, 0u32, "");
    let path = "/org/freedesktop/PolicyKit1/Authority";
    let reply = ours.call_method(Some(polkit), path, Some(interface), "CheckAuthorization", &question).await.unwrap();
    let (authorized, challenge, _): (bool, bool, HashMap<String, String>) = reply.body().deserialize().unwrap();
    match (authorized, challenge) {
        (true, _) => "yes",
        (false, true) => "password",
        (false, false) => "no",
    }
}

#[tokio::test]
async fn without_rules_only_reading_is_free() {
    let Some(daemon) = Daemon::system_bus(Setup::default()) else { return };
    for &action in Action::ALL {
        let expected = if is_free(action) { "yes" } else { "password" };
        for user in [ALICE, OPERATOR, ADMIN] {
            assert_eq!(answer(&daemon, &user, action, true).await, expected, "{action:?} by {}", user.name);
        }
    }
}

#[tokio::test]
async fn the_owner_may_do_all_but_what_is_as_good_as_root() {
    let Some(daemon) = Daemon::system_bus(Setup::with_example_rules()) else { return };
    for &action in Action::ALL {
        let rootlike = matches!(action, Action::Define | Action::Device | Action::Native)
            || !matches!(action.kind(), ObjectKind::Domain | ObjectKind::Volume);
        let rootlike = rootlike && !is_free(action);
        assert_eq!(
            answer(&daemon, &ALICE, action, true).await,
            if rootlike { "password" } else { "yes" },
            "{action:?}"
        );
        let stranger = if is_free(action) { "yes" } else { "password" };
        assert_eq!(answer(&daemon, &BOB, action, true).await, stranger, "{action:?}");
        assert_eq!(answer(&daemon, &ALICE, action, false).await, stranger, "{action:?}, no owner yet");
    }
}

#[tokio::test]
async fn group_virt_starts_and_stops_and_group_virt_admin_defines() {
    use Action::{Console, Define, Device, Start, Stop, Suspend};
    let Some(daemon) = Daemon::system_bus(Setup::with_example_rules()) else { return };
    for &action in Action::ALL {
        let expected = |free: &[Action]| if free.contains(&action) || is_free(action) { "yes" } else { "password" };
        let operator = expected(&[Start, Stop, Suspend, Console]);
        assert_eq!(answer(&daemon, &OPERATOR, action, true).await, operator, "{action:?}");
        let admin = expected(&[Define, Device]);
        assert_eq!(answer(&daemon, &ADMIN, action, false).await, admin, "{action:?}");
    }
}
