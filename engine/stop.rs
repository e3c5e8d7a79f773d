//! Stop strings: what may be shown while a text grows, and where it ends.
//!
//! Owns the matching of stop strings against text that arrives in pieces. Refuses to know tokens,
//! requests and transports: it sees text and answers with text, so that the streamed answer, the whole
//! answer and the command line cut at the same byte.
//!
//! An Aho-Corasick automaton over bytes reads each byte once. Its depth after a byte is the length of
//! the longest suffix of the text that begins some stop string, which is exactly what must be held
//! back; nothing is searched twice, so texts made to be slow (`aaaa…`) cost what others cost. Stop
//! strings and pieces are whole UTF-8, so a suffix that begins a stop string begins at a character, and
//! no cut can split one.

use crate::request::SubmitError;

/// Most stop strings in one request.
pub const MAX_STOP_STRINGS: usize = 64;
/// Longest stop string.
pub const MAX_STOP_BYTES: usize = 1024;

/// Text below this is not moved to the front of the buffer.
const COMPACT_BYTES: usize = 4096;

/// One state of the automaton: a prefix of at least one stop string.
struct Node {
    /// Next byte and state, sorted by byte.
    children: Vec<(u8, u32)>,
    /// State of the longest proper suffix that is also a prefix of a stop string.
    fallback: u32,
    /// Length of the prefix.
    depth_bytes: u32,
    /// Length of the longest stop string that ends here; 0 = none.
    match_bytes: u32,
}

impl Node {
    fn new(depth_bytes: u32) -> Self {
        Self { children: Vec::new(), fallback: 0, depth_bytes, match_bytes: 0 }
    }

    fn child(&self, byte: u8) -> Option<u32> {
        self.children.binary_search_by_key(&byte, |&(b, _)| b).ok().map(|at| self.children[at].1)
    }
}

/// What one piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// Text that no later piece can take back.
    pub emit: String,
    /// A stop string is complete: the generation is over, and nothing follows.
    pub matched: bool,
}

/// Finds the first stop string in a growing text.
///
/// "First" is the one complete soonest, byte by byte; of several that end at the same byte, the
/// longest. This does not depend on how the text was cut into pieces.
pub struct StopMatcher {
    nodes: Vec<Node>,
    state: u32,
    /// Text received; `[..emitted]` has been handed out.
    text: String,
    emitted: usize,
    matched: bool,
    include_in_output: bool,
}

impl StopMatcher {
    /// A matcher for any of `strings`; with none of them it passes text through. With
    /// `include_in_output` the stop string itself is part of the text.
    ///
    /// # Errors
    /// [`SubmitError::Invalid`] for an empty string, more than [`MAX_STOP_STRINGS`] strings, or one
    /// longer than [`MAX_STOP_BYTES`].
    pub fn new<S: AsRef<str>>(strings: &[S], include_in_output: bool) -> Result<Self, SubmitError> {
        validate(strings)?;
        let mut nodes = vec![Node::new(0)];
        for string in strings {
            insert(&mut nodes, string.as_ref().as_bytes());
        }
        link(&mut nodes);
        Ok(Self { nodes, state: 0, text: String::new(), emitted: 0, matched: false, include_in_output })
    }

    /// Takes the next piece of the text. After a match every further piece is ignored.
    pub fn push(&mut self, text: &str) -> Pushed {
        if self.matched {
            return Pushed { emit: String::new(), matched: true };
        }
        let before = self.text.len();
        for (at, &byte) in text.as_bytes().iter().enumerate() {
            self.state = self.step(byte);
            let match_bytes = self.nodes[self.state as usize].match_bytes as usize;
            if match_bytes > 0 {
                self.text.push_str(&text[..=at]);
                let end = before + at + 1;
                let cut = if self.include_in_output { end } else { end - match_bytes };
                self.matched = true;
                return Pushed { emit: self.take(cut), matched: true };
            }
        }
        self.text.push_str(text);
        let held = self.nodes[self.state as usize].depth_bytes as usize;
        Pushed { emit: self.take(self.text.len() - held), matched: false }
    }

    /// The text has ended: what was held back, empty after a match.
    pub fn finish(&mut self) -> String {
        if self.matched { String::new() } else { self.take(self.text.len()) }
    }

    /// Bytes held back now.
    pub fn held_bytes(&self) -> usize {
        if self.matched { 0 } else { self.text.len() - self.emitted }
    }

    fn step(&self, byte: u8) -> u32 {
        let mut state = self.state;
        loop {
            let node = &self.nodes[state as usize];
            match node.child(byte) {
                Some(next) => return next,
                None if state == 0 => return 0,
                None => state = node.fallback,
            }
        }
    }

    /// Hands out the text up to `end` and now and then forgets it, so that the cost of moving what is
    /// held back stays below the text's own length.
    fn take(&mut self, end: usize) -> String {
        let emit = self.text[self.emitted..end].to_owned();
        self.emitted = end;
        if self.emitted > COMPACT_BYTES && self.emitted > self.text.len() / 2 {
            self.text.drain(..self.emitted);
            self.emitted = 0;
        }
        emit
    }
}

/// Checks stop strings without building anything.
///
/// # Errors
/// As [`StopMatcher::new`].
pub fn validate<S: AsRef<str>>(strings: &[S]) -> Result<(), SubmitError> {
    let invalid = |message: String| Err(SubmitError::Invalid { param: "stop", message });
    if strings.len() > MAX_STOP_STRINGS {
        return invalid(format!("{} stop strings; at most {MAX_STOP_STRINGS} are allowed", strings.len()));
    }
    for string in strings.iter().map(AsRef::as_ref) {
        if string.is_empty() {
            return invalid("a stop string is empty".into());
        }
        if string.len() > MAX_STOP_BYTES {
            return invalid(format!("a stop string has {} bytes; at most {MAX_STOP_BYTES}", string.len()));
        }
    }
    Ok(())
}

fn insert(nodes: &mut Vec<Node>, string: &[u8]) {
    let mut state = 0;
    for (depth, &byte) in (1..).zip(string) {
        state = match nodes[state].children.binary_search_by_key(&byte, |&(b, _)| b) {
            Ok(at) => nodes[state].children[at].1 as usize,
            Err(at) => {
                let next = nodes.len();
                nodes[state].children.insert(at, (byte, next as u32));
                nodes.push(Node::new(depth));
                next
            }
        };
    }
    nodes[state].match_bytes = string.len() as u32;
}

/// Sets the fallbacks, shallow states first: a state's fallback is shallower than the state.
fn link(nodes: &mut [Node]) {
    let mut queue: Vec<u32> = nodes[0].children.iter().map(|&(_, child)| child).collect();
    let mut next = 0;
    while let Some(&state) = queue.get(next) {
        next += 1;
        for at in 0..nodes[state as usize].children.len() {
            let (byte, child) = nodes[state as usize].children[at];
            let mut suffix = nodes[state as usize].fallback;
            let fallback = loop {
                match nodes[suffix as usize].child(byte) {
                    Some(found) => break found,
                    None if suffix == 0 => break 0,
                    None => suffix = nodes[suffix as usize].fallback,
                }
            };
            let inherited = nodes[fallback as usize].match_bytes;
            let node = &mut nodes[child as usize];
            node.fallback = fallback;
            if node.match_bytes == 0 {
                node.match_bytes = inherited;
            }
            queue.push(child);
        }
    }
}
