//! What machines of other hosts are called here. A host may have two of one uuid or name, and other hosts, or we ourselves, the
//! same ones: whoever was first keeps both, and the others get what nobody has.

use uuid::Uuid;
use virt_model::driver::inventory::Key;
use virt_model::xml::{check_new_name, plainly};

/// The uuid of a machine whose own another one has: the same whenever it is asked for.
pub(super) fn second_uuid(host: &str, key: &Key) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_URL, format!("virt:{host}/{key}").as_bytes())
}

/// The names that a machine may have here, the first that is free. One that looks like another is none of them: it is written out.
pub(super) fn names(host: &str, name: &str, key: &Key) -> Vec<String> {
    let own = check_new_name(name).is_ok().then(|| name.to_owned());
    let (plain, key) = (plainly(name), key.to_string());
    let (plain, key) = (plain.trim(), plainly(&key));
    own.into_iter().chain([format!("{plain}@{host}"), format!("{plain}@{host} ({key})")]).collect()
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

    #[test]
    fn a_name_that_looks_like_another_is_written_out() {
        let key = Key("7".into());
        assert_eq!(names("lab", "web", &key), ["web", "web@lab", "web@lab (7)"]);
        assert_eq!(names("lab", "we\u{200b}b", &key), ["we\\u{200b}b@lab", "we\\u{200b}b@lab (7)"]);
        assert_eq!(names("lab", " web ", &key), ["web@lab", "web@lab (7)"]);
    }
}
