//! Slurm's short form of a list of hosts: `gpu[01-03,7],login1` (slurm.conf(5), "NodeName").

/// More hosts than any job has; a range beyond is a mistake, not a list.
const MOST: usize = 65_536;

/// All hosts of `list`, in its order.
///
/// # Errors
/// Words for what is no such list.
pub fn expand(list: &str) -> Result<Vec<String>, String> {
    let wrong = |why: &str| format!("`{list}` is no list of hosts: {why}");
    let mut hosts = Vec::new();
    for item in
        split_outside_brackets(list).ok_or_else(|| wrong("a bracket lacks its other half"))?
    {
        if item.is_empty() {
            return Err(wrong("a name is empty"));
        }
        hosts.extend(expand_item(item).ok_or_else(|| wrong("a range is not one of numbers"))?);
        if hosts.len() > MOST {
            return Err(wrong("it is too long"));
        }
    }
    Ok(hosts)
}

/// The parts between commas that are not within brackets; `None` when brackets do not match.
fn split_outside_brackets(list: &str) -> Option<Vec<&str>> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (at, character) in list.char_indices() {
        match (character, inside) {
            ('[', false) => inside = true,
            (']', true) => inside = false,
            ('[', true) | (']', false) => return None,
            (',', false) => {
                parts.push(&list[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    (!inside).then_some(parts)
}

/// The hosts of one name with any number of brackets.
fn expand_item(item: &str) -> Option<Vec<String>> {
    let Some((before, rest)) = item.split_once('[') else { return Some(vec![item.to_owned()]) };
    let (ranges, after) = rest.split_once(']')?;
    let tails = expand_item(after)?;
    let mut hosts = Vec::new();
    for range in ranges.split(',') {
        let (low, high) = range.split_once('-').unwrap_or((range, range));
        let width = low.len();
        let (low, high): (usize, usize) = (low.parse().ok()?, high.parse().ok()?);
        if low > high || (high - low) * tails.len() > MOST {
            return None;
        }
        for number in low..=high {
            hosts.extend(tails.iter().map(|tail| format!("{before}{number:0width$}{tail}")));
        }
    }
    Some(hosts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_ranges_and_zeros_are_expanded_in_order() {
        let cases = [
            ("h1", vec!["h1"]),
            ("h1,h2", vec!["h1", "h2"]),
            ("gpu[08-10]", vec!["gpu08", "gpu09", "gpu10"]),
            ("gpu[1,3-4],login", vec!["gpu1", "gpu3", "gpu4", "login"]),
            ("r[0-1]n[1-2].site", vec!["r0n1.site", "r0n2.site", "r1n1.site", "r1n2.site"]),
        ];
        for (list, expected) in cases {
            assert_eq!(expand(list).unwrap(), expected, "{list}");
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for list in ["", "a,,b", "a[1", "a]1", "a[x-y]", "a[3-1]", "a[1-99999999]", "a[[1]]"] {
            let text = expand(list).unwrap_err();
            assert!(text.starts_with(&format!("`{list}` is no list of hosts: ")), "{text}");
        }
    }
}
