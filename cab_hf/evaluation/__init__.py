"""What a student can do, beside its teacher."""
