"""What is asked: a job, a zoo of jobs, and the files that say so."""
