//! Cuts a byte stream into the tokens of QMP's JSON dialect [QMP spec §Input], a piece at a time.
//!
//! The dialect is JSON with single-quoted strings beside the usual ones. The lexer looks at structure only: escapes,
//! UTF-8 and number ranges are the parser's business. It owns the bytes of the token it is in, and no more than the
//! budget that its owner sets.
//!
//! After a byte that starts no token, or a token broken off, the lexer reports one [`Kind::Stray`] and skips what
//! follows until a structural character, a control character other than a tab, or 0xFE/0xFF. Those two bytes can be in no valid text, so
//! a client that sends one makes sure that whatever was half said before is forgotten.

use std::mem;

/// What kind of token was found. Its bytes are [`Lexer::text`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `{`
    BraceOpen,
    /// `}`
    BraceClose,
    /// `[`
    BracketOpen,
    /// `]`
    BracketClose,
    /// `:`
    Colon,
    /// `,`
    Comma,
    /// A number without fraction and exponent, of any size.
    Integer,
    /// A number with a fraction, an exponent or both.
    Float,
    /// A run of the letters a to z, which may or may not be `true`, `false` or `null`.
    Keyword,
    /// A string with its quotes, single or double. Escapes are not yet looked at.
    String,
    /// Bytes that are no token. The lexer now skips until it can start afresh.
    Stray,
    /// A token that was cut short because it outgrew the budget. The lexer now skips as after [`Kind::Stray`].
    TooLong,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum State {
    #[default]
    Start,
    /// After a stray token: skipping.
    Recovery,
    Keyword,
    /// In a string that this quote character ends.
    String(u8),
    /// After a backslash in such a string.
    Escape(u8),
    /// After `-`, before any digit.
    Minus,
    /// After a leading `0`, which no digit may follow.
    Zero,
    Integer,
    /// After the decimal point, before any digit.
    Point,
    Fraction,
    /// After `e`.
    Exponent,
    /// After `e+` or `e-`.
    ExponentSign,
    ExponentDigits,
}

/// What to do with one byte.
enum Step {
    /// The byte belongs to the token; go on in this state.
    Take(State),
    /// The byte belongs to no token.
    Skip,
    /// The byte belongs to no token and ends the skipping without being used up.
    Restart,
    /// The byte completes the token.
    Complete(Kind),
    /// The token was complete before this byte, which is not used up.
    Before(Kind),
}

/// The lexer's state between two bytes.
#[derive(Debug, Default)]
pub struct Lexer {
    state: State,
    text: Vec<u8>,
    /// `text` was handed out and is to be emptied first.
    complete: bool,
}

/// A buffer that grew beyond this for one token is given back after it.
const KEEP_CAPACITY: usize = 64 * 1024;

impl Lexer {
    /// A lexer at the start of a stream.
    pub fn new() -> Lexer {
        Lexer::default()
    }

    /// The bytes of the token that [`Lexer::next`] just returned. A string has its quotes, a stray token ends with the
    /// byte that broke it.
    pub fn text(&self) -> &[u8] {
        &self.text
    }

    /// Takes bytes from the front of `input` until one token is complete. `None`: all bytes are used up. A token longer
    /// than `budget` bytes becomes [`Kind::TooLong`].
    pub fn next(&mut self, input: &mut &[u8], budget: usize) -> Option<Kind> {
        if mem::take(&mut self.complete) {
            self.text.clear();
            self.text.shrink_to(KEEP_CAPACITY);
        }
        loop {
            if let State::String(quote) = self.state {
                self.take_plain(input, quote, budget);
            }
            let (&byte, rest) = input.split_first()?;
            match self.step(byte) {
                Step::Take(state) => {
                    self.state = state;
                    self.text.push(byte);
                    *input = rest;
                    if self.text.len() > budget {
                        return Some(self.finish(Kind::TooLong));
                    }
                }
                Step::Skip => *input = rest,
                Step::Restart => self.state = State::Start,
                Step::Complete(kind) => {
                    self.text.push(byte);
                    *input = rest;
                    let kind = if self.text.len() > budget { Kind::TooLong } else { kind };
                    return Some(self.finish(kind));
                }
                Step::Before(kind) => return Some(self.finish(kind)),
            }
        }
    }

    /// Ends the stream: the token that was waiting for its next byte, if there is one. What was broken off is stray.
    pub fn end(&mut self) -> Option<Kind> {
        if mem::take(&mut self.complete) {
            self.text.clear();
        }
        let kind = match self.state {
            State::Start | State::Recovery => return None,
            State::Keyword => Kind::Keyword,
            State::Zero | State::Integer => Kind::Integer,
            State::Fraction | State::ExponentDigits => Kind::Float,
            _ => Kind::Stray,
        };
        Some(self.finish(kind))
    }

    fn finish(&mut self, kind: Kind) -> Kind {
        self.complete = true;
        self.state = match kind {
            Kind::Stray | Kind::TooLong => State::Recovery,
            _ => State::Start,
        };
        kind
    }

    /// Moves the bytes of a string that need no decision, as far as the budget goes.
    fn take_plain(&mut self, input: &mut &[u8], quote: u8, budget: usize) {
        let room = budget.saturating_sub(self.text.len());
        let plain = |&b: &u8| (0x20..0xFE).contains(&b) && b != quote && b != b'\\';
        let length = input.iter().take(room).take_while(|b| plain(b)).count();
        let (run, rest) = input.split_at_checked(length).unwrap_or((input, &[]));
        self.text.extend_from_slice(run);
        *input = rest;
    }

    fn step(&self, byte: u8) -> Step {
        use State::*;
        match (self.state, byte) {
            (Start, b' ' | b'\t' | b'\r' | b'\n') => Step::Skip,
            (Start, b'{') => Step::Complete(Kind::BraceOpen),
            (Start, b'}') => Step::Complete(Kind::BraceClose),
            (Start, b'[') => Step::Complete(Kind::BracketOpen),
            (Start, b']') => Step::Complete(Kind::BracketClose),
            (Start, b':') => Step::Complete(Kind::Colon),
            (Start, b',') => Step::Complete(Kind::Comma),
            (Start, b'"' | b'\'') => Step::Take(String(byte)),
            (Start, b'a'..=b'z') => Step::Take(Keyword),
            (Start, b'-') => Step::Take(Minus),
            (Start, b'0') => Step::Take(Zero),
            (Start, b'1'..=b'9') => Step::Take(Integer),

            (Recovery, b'{' | b'}' | b'[' | b']' | b':' | b',' | 0x00..=0x1F | 0xFE..=0xFF) if byte != b'\t' => {
                Step::Restart
            }
            (Recovery, _) => Step::Skip,

            (Keyword, b'a'..=b'z') => Step::Take(Keyword),
            (Keyword, _) => Step::Before(Kind::Keyword),

            (String(quote), _) if byte == quote => Step::Complete(Kind::String),
            (String(quote), b'\\') => Step::Take(Escape(quote)),
            (String(quote) | Escape(quote), 0x20..=0xFD) => Step::Take(String(quote)),

            (Minus, b'0') => Step::Take(Zero),
            (Minus, b'1'..=b'9') => Step::Take(Integer),
            (Integer, b'0'..=b'9') => Step::Take(Integer),
            (Zero | Integer, b'.') => Step::Take(Point),
            (Zero | Integer | Fraction, b'e' | b'E') => Step::Take(Exponent),
            (Zero, b'0'..=b'9') => Step::Complete(Kind::Stray),
            (Zero | Integer, _) => Step::Before(Kind::Integer),
            (Point | Fraction, b'0'..=b'9') => Step::Take(Fraction),
            (Exponent, b'+' | b'-') => Step::Take(ExponentSign),
            (Exponent | ExponentSign | ExponentDigits, b'0'..=b'9') => Step::Take(ExponentDigits),
            (Fraction | ExponentDigits, _) => Step::Before(Kind::Float),

            (Start | String(_) | Escape(_) | Minus | Point | Exponent | ExponentSign, _) => Step::Complete(Kind::Stray),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(input: &[u8], budget: usize) -> Vec<(Kind, String)> {
        let mut lexer = Lexer::new();
        let mut rest = input;
        let mut found = Vec::new();
        while let Some(kind) = lexer.next(&mut rest, budget) {
            found.push((kind, String::from_utf8_lossy(lexer.text()).into_owned()));
        }
        assert!(rest.is_empty(), "a lexer that returns nothing has used everything");
        found
    }

    #[test]
    fn one_token_may_end_where_the_next_begins() {
        let found = tokens(b"{'a\\'b':-0.5e+7,nul[12]\"x\\\"\"0x 01 @ skipped \t2\n1e\xFF\xFE ", usize::MAX);
        let expected = [
            (Kind::BraceOpen, "{"),
            (Kind::String, "'a\\'b'"),
            (Kind::Colon, ":"),
            (Kind::Float, "-0.5e+7"),
            (Kind::Comma, ","),
            (Kind::Keyword, "nul"),
            (Kind::BracketOpen, "["),
            (Kind::Integer, "12"),
            (Kind::BracketClose, "]"),
            (Kind::String, "\"x\\\"\""),
            (Kind::Integer, "0"),
            (Kind::Keyword, "x"),
            (Kind::Stray, "01"),
            (Kind::Stray, "1e\u{FFFD}"),
            (Kind::Stray, "\u{FFFD}"),
        ];
        assert_eq!(found, expected.map(|(kind, text)| (kind, text.to_owned())));
    }

    #[test]
    fn a_token_over_the_budget_is_cut_and_skipped() {
        assert_eq!(tokens(b"'abc' 'd'", 5), [(Kind::String, "'abc'".into()), (Kind::String, "'d'".into())]);
        assert_eq!(tokens(b"'abcd' 'd',", 5), [(Kind::TooLong, "'abcd'".into()), (Kind::Comma, ",".into())]);
        assert_eq!(tokens(b"123456 7", 5), [(Kind::TooLong, "123456".into())]);
        let long = [b"'".as_slice(), &[b'x'; 1 << 20], b"'\n1 "].concat();
        let found = tokens(&long, 5);
        assert_eq!(found, [(Kind::TooLong, "'xxxxx".into()), (Kind::Integer, "1".into())]);
    }
}
