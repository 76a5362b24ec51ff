//! Texts that have most of their lines in common, as machines' documents have: each line is kept once, and a text is the
//! numbers of its lines. Of the 5 KiB of a usual machine some 1 KiB is left.

use crate::lock::lock;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

/// The lines of all texts of this process.
static TABLE: LazyLock<Mutex<Table>> = LazyLock::new(Mutex::default);

/// A text. What it has alone is given back with it.
#[derive(Debug)]
pub(crate) struct Text(Box<[u32]>);

#[derive(Default)]
struct Table {
    numbers: HashMap<Arc<str>, u32>,
    /// By number; without a text the number is free.
    lines: Vec<(Option<Arc<str>>, u32)>,
    free: Vec<u32>,
}

impl Text {
    pub fn new(text: &str) -> Text {
        let mut table = lock(&TABLE);
        Text(text.split_inclusive('\n').map(|line| table.number_of(line)).collect())
    }

    /// All of it.
    pub fn whole(&self) -> String {
        let table = lock(&TABLE);
        self.0.iter().filter_map(|number| table.lines.get(*number as usize)?.0.as_deref()).collect()
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        let mut table = lock(&TABLE);
        self.0.iter().for_each(|number| table.give_back(*number));
    }
}

impl Table {
    /// The number of a line, which has one use more.
    fn number_of(&mut self, text: &str) -> u32 {
        if let Some(number) = self.numbers.get(text).copied() {
            if let Some((_, uses)) = self.lines.get_mut(number as usize) {
                *uses += 1;
            }
            return number;
        }
        let text: Arc<str> = text.into();
        let line = (Some(text.clone()), 1);
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.lines.push((None, 0));
                // All documents together are bounded far below that.
                (self.lines.len() - 1) as u32
            }
        };
        self.lines[number as usize] = line;
        self.numbers.insert(text, number);
        number
    }

    fn give_back(&mut self, number: u32) {
        let Some((text, uses)) = self.lines.get_mut(number as usize) else { return };
        *uses -= 1;
        if *uses == 0
            && let Some(text) = text.take()
        {
            self.numbers.remove(&text);
            self.free.push(number);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_what_it_was_and_leaves_nothing_behind() {
        let kept = |line: &str| lock(&TABLE).numbers.contains_key(line);
        let texts = ["", "\n", "a line of this test\nanother\r\n\nno end", "a line of this test\n"];
        let all: Vec<Text> = texts.iter().map(|text| Text::new(text)).collect();
        assert_eq!(all.iter().map(Text::whole).collect::<Vec<_>>(), texts);
        assert_eq!(all[2].0[0], all[3].0[0], "what they have in common is one");
        let mut all = all;
        drop(all.swap_remove(2));
        assert!(kept("a line of this test\n") && !kept("no end"));
        drop(all);
        assert!(!kept("a line of this test\n"));
        assert_eq!(Text::new("no end\na line of this test").whole(), "no end\na line of this test");
    }
}
