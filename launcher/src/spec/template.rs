//! A template that is valid as it is: values are put in the place of those it has, all in one pass, so
//! that what was put in is never taken for something to replace.

use anyhow::{Result, bail};

/// Replaces every `(default, value)`, the longest default first.
///
/// # Errors
/// A default that the template does not have: template and program have come apart.
pub fn fill(template: &str, values: &[(&str, String)]) -> Result<String> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(values[*index].0.len()));
    let mut used = vec![false; values.len()];
    let mut filled = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(first) = rest.chars().next() {
        match order.iter().copied().find(|index| rest.starts_with(values[*index].0)) {
            Some(index) => {
                used[index] = true;
                filled.push_str(&values[index].1);
                rest = &rest[values[index].0.len()..];
            }
            None => {
                filled.push(first);
                rest = &rest[first.len_utf8()..];
            }
        }
    }
    if let Some(index) = used.iter().position(|used| !used) {
        bail!("the template has nothing like: {}", values[index].0.trim());
    }
    Ok(filled)
}

/// Leaves out the lines that are `line`, but for spaces at their sides.
pub fn without_lines(text: &str, line: &str) -> String {
    text.split_inclusive('\n').filter(|have| have.trim() != line).collect()
}

/// Puts other lines in the place of the comment at the top.
pub fn with_heading(text: &str, heading: &str) -> String {
    let is_comment = |line: &&str| line.starts_with('#');
    let body: String = text.split_inclusive('\n').skip_while(is_comment).collect();
    format!("{heading}\n{body}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_put_in_is_not_replaced_again() {
        let values = [("name: a", "name: b".to_owned()), ("name: b", "name: c".to_owned())];
        assert_eq!(fill("name: a, name: b", &values).unwrap(), "name: b, name: c");
        let longest = [("ab", "1".to_owned()), ("a", "2".to_owned())];
        assert_eq!(fill("aab", &longest).unwrap(), "21");
        assert!(fill("x", &[("y", String::new())]).unwrap_err().to_string().ends_with(": y"));
    }

    #[test]
    fn lines_and_headings() {
        assert_eq!(without_lines("a\n  b\nbc\n", "b"), "a\nbc\n");
        assert_eq!(with_heading("# one\n# two\nx: 1 # three\n", "# new"), "# new\nx: 1 # three\n");
    }
}
