//! The table in `docs/HYPERVISORS.md` is that of the cases and the beds.

use crate::{CASES, beds};
use std::fmt::Write as _;
use std::path::Path;

const MARK: &str = "<!-- cases -->\n";

fn table() -> String {
    let beds = beds::all();
    let (mut head, mut rule) = ("| | needs |".to_owned(), "| --- | --- |".to_owned());
    for bed in &beds {
        let _ = write!(head, " {} |", bed.called());
        rule.push_str(" --- |");
    }
    let mut text = format!("\n{head}\n{rule}\n");
    for case in CASES {
        let needs: Vec<String> = case.needs.iter().map(|word| format!("`{word}`")).collect();
        let _ = write!(text, "| {} | {} |", case.what, needs.join(" "));
        for bed in &beds {
            let _ = write!(text, " {} |", if case.fits(&**bed) { "yes" } else { "–" });
        }
        text.push('\n');
    }
    text
}

#[test]
fn the_table_of_cases_is_the_one_in_the_docs() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/HYPERVISORS.md");
    let page = std::fs::read_to_string(&file).expect("the page");
    let (before, shown) = page.split_once(MARK).expect("the mark");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&file, format!("{before}{MARK}{}", table())).expect("written");
        return;
    }
    assert_eq!(shown, table(), "write it with UPDATE=1");
}
