//! Several requests of one task at the same time.

use block::IoResult;

/// Runs all to their ends; the result is the first error among them. For a few futures: each wake-up polls all.
pub async fn join_all<F: Future<Output = IoResult>>(futures: Vec<F>) -> IoResult {
    block::join::each(futures).await.into_iter().collect()
}
