//! What machines of other hosts are called here. A host may have two of one uuid or name, and other hosts, or we ourselves, the
//! same ones: whoever was first keeps both, and the others get what nobody has.

use uuid::Uuid;
use virt_model::driver::inventory::Key;

/// The uuid of a machine whose own another one has: the same whenever it is asked for.
pub(super) fn second_uuid(host: &str, key: &Key) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("virt:{host}/{key}").as_bytes())
}

/// The names that a machine may have here, the first that is free.
pub(super) fn names(host: &str, name: &str, key: &Key) -> [String; 3] {
    [name.to_owned(), format!("{name}@{host}"), format!("{name}@{host} ({key})")]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_uuid_is_one_of_version_5() {
        let key = Key("vm-7".into());
        let uuid = second_uuid("lab", &key);
        assert_eq!((uuid.get_version_num(), uuid), (5, second_uuid("lab", &key)));
        assert_ne!(uuid, second_uuid("lab2", &key));
    }
}
