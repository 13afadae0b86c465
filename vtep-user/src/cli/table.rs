//! Aligned columns without borders, like `ip` and `bridge` print them, and
//! colours by the line. Used by `text`.

use comfy_table::{CellAlignment, presets};

/// Whether to colour: decided once, in `cli`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Colour(pub bool);

impl Colour {
    fn wrap(self, code: &str, text: &str) -> String {
        if self.0 {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }

    pub fn bold(self, text: &str) -> String {
        self.wrap("1", text)
    }

    /// As it should be.
    pub fn good(self, text: &str) -> String {
        self.wrap("32", text)
    }

    /// To be looked at.
    pub fn notice(self, text: &str) -> String {
        self.wrap("33", text)
    }
}

/// Rows below a head; some are marked.
pub struct Table {
    inner: comfy_table::Table,
    marked: Vec<bool>,
}

impl Table {
    /// Names of the columns; a leading `>` aligns right.
    pub fn new(head: &[&str]) -> Self {
        let mut inner = comfy_table::Table::new();
        inner.load_style(presets::NOTHING);
        inner.set_header(head.iter().map(|name| name.trim_start_matches('>')));
        for (column, name) in inner.column_iter_mut().zip(head) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Self {
            inner,
            marked: Vec::new(),
        }
    }

    /// One row, one line: control characters, which device names may contain,
    /// do not reach the terminal.
    pub fn row(&mut self, marked: bool, cells: impl IntoIterator<Item = String>) {
        let clean = |cell: String| cell.replace(char::is_control, "?");
        self.inner.add_row(cells.into_iter().map(clean));
        self.marked.push(marked);
    }

    /// All lines, each ended; nothing for a table without rows.
    pub fn text(&self, colour: Colour) -> String {
        if self.marked.is_empty() {
            return String::new();
        }
        let mut out = String::new();
        for (number, line) in self.inner.lines().enumerate() {
            let line = line.trim_end();
            out += &match number {
                0 => colour.bold(line),
                _ if self.marked[number - 1] => colour.notice(line),
                _ => line.to_owned(),
            };
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", ">FRAMES", "WHY"]);
        table.row(false, ["a".into(), "1000".into(), String::new()]);
        table.row(
            true,
            ["long-name".into(), "7".into(), "with\x1b[2J\nbreaks".into()],
        );
        table
    }

    #[test]
    fn columns_align_and_nothing_trails() {
        assert_eq!(
            table().text(Colour(false)),
            "NAME       FRAMES  WHY\n\
             a            1000\n\
             long-name       7  with?[2J?breaks\n"
        );
        assert_eq!(Table::new(&["NAME"]).text(Colour(false)), "");
    }

    #[test]
    fn colours_leave_the_columns_alone() {
        let plain = table().text(Colour(false));
        let coloured = table().text(Colour(true));
        assert!(coloured.contains("\x1b[33mlong-name"), "{coloured}");
        let stripped = coloured
            .replace("\x1b[1m", "")
            .replace("\x1b[33m", "")
            .replace("\x1b[0m", "");
        assert_eq!(stripped, plain);
    }
}
