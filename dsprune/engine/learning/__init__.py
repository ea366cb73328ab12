"""What a step of training is made of: batches, student, teacher, losses, replica, guard, trainer, evaluation."""
