//! What a kernel that checks itself finds in the modules: leaks, and failing allocations.
