//! All rows, by the elements that they are about, held against a document in one walk.

use super::rows::Row;
use super::{once, pairs, seats, values};
use crate::xml::{Element, Finding, Place};
use std::collections::HashMap;
use std::sync::LazyLock;

static TABLE: LazyLock<HashMap<String, Vec<&'static dyn Row>>> = LazyLock::new(|| {
    let mut table: HashMap<String, Vec<&'static dyn Row>> = HashMap::new();
    let all = values::ROWS.iter().map(|row| row as &dyn Row).chain(pairs::ROWS.iter().map(|row| row as &dyn Row));
    let all = all.chain(once::ROWS.iter().map(|row| row as &dyn Row));
    for row in all.chain(seats::ROWS.iter().map(|row| row as &dyn Row)) {
        each_path(row.of()).into_iter().for_each(|path| table.entry(path).or_default().push(row));
    }
    table
});

/// The paths that a pattern stands for.
fn each_path(pattern: &str) -> Vec<String> {
    pattern.split('/').fold(vec![String::new()], |paths, step| {
        let longer =
            |path: &String, name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}/{name}") };
        paths.iter().flat_map(|path| step.split('|').map(move |name| longer(path, name))).collect()
    })
}

/// Holds all rows against a document.
pub(super) fn hold(root: &Element, log: &mut Vec<Finding>) {
    walk(root, &mut String::new(), &root.origin, log);
}

fn walk(element: &Element, path: &mut String, at: &Place, log: &mut Vec<Finding>) {
    let of_any = path.strip_prefix("devices/").filter(|kind| !kind.contains('/')).and_then(|_| TABLE.get("devices/*"));
    for row in TABLE.get(path.as_str()).into_iter().chain(of_any).flatten() {
        row.look(element, at, log);
    }
    for child in element.elements().filter(|child| child.name != "metadata") {
        let length = path.len();
        if length > 0 {
            path.push('/');
        }
        path.push_str(&child.name);
        walk(child, path, &child.place_below(at), log);
        path.truncate(length);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_about_what_is_in_the_format() {
        let known: std::collections::HashSet<String> =
            crate::domain::vocabulary().into_iter().map(|(path, _)| path).collect();
        for path in TABLE.keys().filter(|path| *path != "devices/*") {
            assert!(known.contains(path), "{path}");
        }
        assert!(TABLE.len() > 40, "the tables are there");
    }
}
