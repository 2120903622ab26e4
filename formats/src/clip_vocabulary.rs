//! The vocabulary of CLIP ViT-L/14, which SD1, SD2 and SDXL share, embedded in this program.

/// Begins every text.
pub const BEGIN: &str = "<|startoftext|>";
/// Ends every text; SD1 pads with it, too.
pub const END: &str = "<|endoftext|>";

/// Merges of the byte-pair encoding in their order, one `left right` a line.
pub const MERGES: &str = include_str!("../data/clip_bpe_merges.txt");

/// The merges as pairs.
pub fn merges() -> impl Iterator<Item = (&'static str, &'static str)> {
    MERGES.lines().filter_map(|line| line.split_once(' '))
}

/// All 49408 tokens in the order of their ids: bytes, bytes that end a word, merges, begin and
/// end.
pub fn tokens() -> Vec<String> {
    let bytes = byte_characters();
    bytes
        .iter()
        .map(char::to_string)
        .chain(bytes.iter().map(|byte| format!("{byte}</w>")))
        .chain(merges().map(|(left, right)| format!("{left}{right}")))
        .chain([BEGIN.to_owned(), END.to_owned()])
        .collect()
}

/// The characters that stand for the 256 bytes, in the order of CLIP's vocabulary: printable ones
/// for themselves first, then the others as the characters from U+0100 on.
fn byte_characters() -> Vec<char> {
    let printable = |byte: &u32| matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF);
    let own = (0..256u32).filter(printable);
    let others = (0..256u32).filter(|byte| !printable(byte)).count() as u32;
    own.chain(256..256 + others).filter_map(char::from_u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_have_the_ids_of_clip() {
        let tokens = tokens();
        assert_eq!(tokens.len(), 49408);
        assert_eq!((tokens[0].as_str(), tokens[49407].as_str()), ("!", END));
        // What every tokenizer of Stable Diffusion gives for `a photo of`.
        assert_eq!(
            [320, 1125, 539].map(|id: usize| &*tokens[id]),
            ["a</w>", "photo</w>", "of</w>"]
        );
    }
}
