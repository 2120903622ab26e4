//! Weights in captions: `(word)`, `(word:1.2)`, `[word]`, as sd-scripts and WebUI read them.

const ROUND: f64 = 1.1;
const SQUARE: f64 = 1.0 / 1.1;

/// What a caption is made of.
#[derive(Debug, PartialEq)]
enum Piece<'a> {
    Escaped(&'a str),
    OpenRound,
    OpenSquare,
    /// `:1.2)`
    Weight(f64, &'a str),
    CloseRound,
    CloseSquare,
    Text(&'a str),
}

/// Splits a caption into parts of one weight. `(a)` weighs 1.1, `[a]` 1/1.1, `(a:w)` w; brackets
/// multiply; a backslash before a bracket or backslash makes it plain text; brackets that are never
/// closed hold to the end.
pub fn parse_weights(caption: &str) -> Vec<(String, f64)> {
    let mut parts: Vec<(String, f64)> = Vec::new();
    let (mut round, mut square) = (Vec::new(), Vec::new());
    let multiply = |parts: &mut Vec<(String, f64)>, from: usize, factor: f64| {
        parts[from..].iter_mut().for_each(|part| part.1 *= factor);
    };
    let mut rest = caption;
    while let Some((piece, after)) = next_piece(rest) {
        rest = after;
        let text = match piece {
            Piece::OpenRound => {
                round.push(parts.len());
                continue;
            }
            Piece::OpenSquare => {
                square.push(parts.len());
                continue;
            }
            Piece::Weight(weight, text) => match round.pop() {
                Some(from) => {
                    multiply(&mut parts, from, weight);
                    continue;
                }
                None => text,
            },
            Piece::CloseRound => match round.pop() {
                Some(from) => {
                    multiply(&mut parts, from, ROUND);
                    continue;
                }
                None => ")",
            },
            Piece::CloseSquare => match square.pop() {
                Some(from) => {
                    multiply(&mut parts, from, SQUARE);
                    continue;
                }
                None => "]",
            },
            Piece::Escaped(text) | Piece::Text(text) => text,
        };
        parts.push((text.to_owned(), 1.0));
    }
    round.into_iter().for_each(|from| multiply(&mut parts, from, ROUND));
    square.into_iter().for_each(|from| multiply(&mut parts, from, SQUARE));
    if parts.is_empty() {
        parts.push((String::new(), 1.0));
    }
    // Neighbours of equal weight are tokenized together, as a word may reach over both.
    parts.dedup_by(|next, previous| {
        let equal = next.1 == previous.1;
        if equal {
            previous.0.push_str(&next.0);
        }
        equal
    });
    parts
}

fn next_piece(text: &str) -> Option<(Piece<'_>, &str)> {
    let first = text.chars().next()?;
    let after = &text[first.len_utf8()..];
    Some(match first {
        '\\' => match after.chars().next() {
            Some('(' | ')' | '[' | ']' | '\\') => (Piece::Escaped(&after[..1]), &after[1..]),
            _ => (Piece::Escaped(""), after),
        },
        '(' => (Piece::OpenRound, after),
        '[' => (Piece::OpenSquare, after),
        ')' => (Piece::CloseRound, after),
        ']' => (Piece::CloseSquare, after),
        ':' => match weight_end(after) {
            Some((weight, end)) => (Piece::Weight(weight, &text[..end + 1]), &text[end + 1..]),
            None => (Piece::Text(":"), after),
        },
        _ => {
            let special = |c: char| matches!(c, '\\' | '(' | ')' | '[' | ']' | ':');
            let end = text.find(special).unwrap_or(text.len());
            (Piece::Text(&text[..end]), &text[end..])
        }
    })
}

/// The number before a closing bracket, and how many bytes both take.
fn weight_end(text: &str) -> Option<(f64, usize)> {
    let close = text.find(')')?;
    let digits = text[..close].strip_prefix(['+', '-']).unwrap_or(&text[..close]);
    if digits.is_empty() || !digits.chars().all(|c| c.is_ascii_digit() || c == '.') {
        return None;
    }
    Some((text[..close].parse().ok()?, close + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(caption: &str, expected: &[(&str, f64)]) {
        let parts = parse_weights(caption);
        let texts: Vec<&str> = parts.iter().map(|part| part.0.as_str()).collect();
        assert_eq!(texts, expected.iter().map(|part| part.0).collect::<Vec<_>>(), "{caption}");
        for (part, (_, weight)) in parts.iter().zip(expected) {
            assert!((part.1 - weight).abs() < 1e-12, "{caption}: {part:?}");
        }
    }

    #[test]
    fn brackets_multiply_and_escapes_are_text() {
        check("normal text", &[("normal text", 1.0)]);
        check("", &[("", 1.0)]);
        check("an (important) word", &[("an ", 1.0), ("important", 1.1), (" word", 1.0)]);
        check("(unbalanced", &[("unbalanced", 1.1)]);
        check("[low", &[("low", 1.0 / 1.1)]);
        check("closed) early]", &[("closed) early]", 1.0)]);
        check(r"\(literal\]", &[("(literal]", 1.0)]);
        check("(two)(parts)", &[("twoparts", 1.1)]);
        check("a:b (c:1.5)", &[("a:b ", 1.0), ("c", 1.5)]);
        check("(c:x) :2) d", &[("c:x", 1.1), (" :2) d", 1.0)]);
        check("(a:1.2.3)", &[("a:1.2.3", 1.1)]);
        check(
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            &[
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        );
    }
}
