//! Votes: of results, and of data.

use block::{Errno, IoResult};
use buf::IoBuf;

/// The same data, and the numbers of the children that have it.
#[derive(Debug, PartialEq, Eq)]
pub struct Version {
    /// The data.
    pub bytes: Vec<u8>,
    /// Who has it.
    pub children: Vec<usize>,
}

/// What was read, each version once, in the order in which they were found.
pub fn versions(read: &[IoResult<IoBuf>]) -> Vec<Version> {
    let mut all: Vec<Version> = Vec::new();
    for (number, buf) in read.iter().enumerate().filter_map(|(number, result)| Some((number, result.as_ref().ok()?))) {
        let bytes = buf.to_vec();
        match all.iter_mut().find(|version| version.bytes == bytes) {
            Some(version) => version.children.push(number),
            None => all.push(Version { bytes, children: vec![number] }),
        }
    }
    all
}

/// The version that most children have; of equal ones that which was found last, as the reference has it.
pub fn winner(versions: &[Version]) -> Option<&Version> {
    versions.iter().max_by_key(|version| version.children.len())
}

/// Success if enough have succeeded, else the error that most have; of equal ones that which was found last.
///
/// # Errors
/// Too few have succeeded.
pub fn of_results(results: &[IoResult], threshold: usize) -> IoResult {
    if results.iter().filter(|result| result.is_ok()).count() >= threshold {
        return Ok(());
    }
    let mut errors: Vec<(Errno, usize)> = Vec::new();
    for errno in results.iter().filter_map(|result| result.err()) {
        match errors.iter_mut().find(|(other, _)| *other == errno) {
            Some((_, count)) => *count += 1,
            None => errors.push((errno, 1)),
        }
    }
    Err(errors.iter().max_by_key(|(_, count)| *count).map_or(Errno::EIO, |(errno, _)| *errno))
}

/// The first byte in which what was read from two children differs.
pub fn first_difference(read: &[IoResult<IoBuf>]) -> Option<u64> {
    let [Ok(one), Ok(other)] = read else { return None };
    let place = one.to_vec().iter().zip(&other.to_vec()).position(|(one, other)| one != other)?;
    u64::try_from(place).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_votes_win_and_the_last_of_equal_ones() {
        let read = |byte: u8| Ok(IoBuf::copy_of(&[byte; 3]));
        let votes = [read(1), Err(Errno::EIO), read(2), read(1), read(3)];
        let versions = versions(&votes);
        assert_eq!(versions.len(), 3);
        assert_eq!(winner(&versions), Some(&Version { bytes: vec![1; 3], children: vec![0, 3] }));
        assert_eq!(winner(&versions[1..]), Some(&Version { bytes: vec![3; 3], children: vec![4] }));
        assert_eq!(winner(&[]), None);
        assert_eq!(first_difference(&[read(1), read(1)]), None);
        assert_eq!(first_difference(&[Ok(IoBuf::copy_of(&[1, 2, 3])), Ok(IoBuf::copy_of(&[1, 2, 4]))]), Some(2));
    }

    #[test]
    fn errors_are_voted_on_where_too_few_succeed() {
        let (eio, enospc) = (Err(Errno::EIO), Err(Errno::ENOSPC));
        assert_eq!(of_results(&[Ok(()), eio, Ok(())], 2), Ok(()));
        assert_eq!(of_results(&[Ok(()), eio, enospc], 2), Err(Errno::ENOSPC));
        assert_eq!(of_results(&[eio, eio, enospc], 1), Err(Errno::EIO));
        assert_eq!(of_results(&[eio; 3], 1), Err(Errno::EIO));
    }
}
