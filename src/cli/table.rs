//! Tables as kubectl prints them: columns as wide as their widest cell, three blanks apart, no blanks at line ends.

use super::escape;

/// `heads` and every row have one cell per column.
pub fn render(heads: &[&str], rows: &[Vec<String>]) -> String {
    // Names are whatever somebody wrote: none ends its line, or counts for more or less than it shows.
    let rows: Vec<Vec<String>> = rows.iter().map(|row| row.iter().map(|cell| escape::line(cell)).collect()).collect();
    let width = |text: &str| text.chars().count();
    let mut widths: Vec<usize> = heads.iter().map(|h| width(h)).collect();
    for row in &rows {
        for (widest, cell) in widths.iter_mut().zip(row) {
            *widest = (*widest).max(width(cell));
        }
    }
    let heads = heads.iter().map(|h| (*h).to_owned()).collect();
    let mut text = String::new();
    for row in std::iter::once(&heads).chain(&rows) {
        let mut line = String::new();
        for (cell, widest) in row.iter().zip(&widths) {
            line.push_str(cell);
            line.extend(std::iter::repeat_n(' ', widest - width(cell) + 3));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_without_blanks() {
        let rows = [vec!["default".to_owned(), "a".to_owned()], vec!["x".to_owned(), "größer".to_owned()]];
        assert_eq!(render(&["NAMESPACE", "NAME"], &rows), "NAMESPACE   NAME\ndefault     a\nx           größer\n");
        assert_eq!(render(&["NAMESPACE", "NAME"], &[]), "NAMESPACE   NAME\n");
    }
}
